"""Curation: from a pool of pictures to the few worth tuning on. Scorers write columns, filters read them.

Kept empty of imports on purpose: processes that score pixels load neither torch nor an engine.
"""
