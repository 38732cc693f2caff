"""What connects memstate_sa to frameworks for agents; each module needs the extra of its name."""
