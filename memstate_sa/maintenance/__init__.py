"""Commands for operators: backfill, verify, doctor, reindex, erase, export and import."""
