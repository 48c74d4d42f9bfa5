"""Every claim of Luo et al. (2016), re-run and set beside its number: one short script a claim."""
