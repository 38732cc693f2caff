"""What an operator runs: backfill, verify, doctor, reindex, erase, export and import."""
