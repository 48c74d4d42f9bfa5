"""The sparse layers: modules around :mod:`widerf.functional`, for one to three axes."""
