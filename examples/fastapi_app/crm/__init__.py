"""A small CRM: accounts, their users, their contacts, and what users note about these."""
