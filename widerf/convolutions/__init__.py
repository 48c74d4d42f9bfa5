"""The convolutions of a model: facts only, nothing is changed here."""
