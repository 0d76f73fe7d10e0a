"""An OpenAI-compatible server: the protocol over HTTP, metrics, a page."""
