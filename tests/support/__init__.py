"""What several test files share: tiny models, the forms of the function, lookalikes, and how a call is observed."""
