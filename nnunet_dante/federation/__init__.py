"""Several sites train one network together: they send what they trained, and images never leave them."""
