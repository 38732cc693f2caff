"""`memstate-sa demo`: one agent's memory, written by hand and with memstate_sa, through failures and a crash."""
