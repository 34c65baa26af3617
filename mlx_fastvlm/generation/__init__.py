"""Generate an answer to a prompt, token by token."""
