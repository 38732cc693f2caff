"""A small CRM: accounts, their users, their contacts, and the notes of users about contacts."""
