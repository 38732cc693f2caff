"""`memstate-sa demo`: one agent memory, kept in step by hand and with memstate_sa, through failures and a crash."""
