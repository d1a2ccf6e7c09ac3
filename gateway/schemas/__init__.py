"""Wire types: what HTTP bodies may hold. They know JSON, not policies, engines or logs."""
