"""Speaking SQL: tables, rows, statements, engines, on PostgreSQL and SQLite. Nothing here knows facts."""
