"""SQL on PostgreSQL and SQLite: tables, rows, statements and engines. This folder does not know facts."""
