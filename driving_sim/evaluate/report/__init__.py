"""The report of an evaluation: its page, its sections, its protocol, and two of them compared."""
