"""Do the roads to the ERF agree, and is the gain that is foretold the one that is measured?"""
