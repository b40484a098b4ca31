"""The OpenAI-compatible server and its page. Empty until they stand."""
