"""Child processes: guarded, so that nothing of them is left behind, however anybody ends."""
