"""Sweeps over one small model for each module under ``timm.models``."""
