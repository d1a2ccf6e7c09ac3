"""The gateway: the composition root and the story of a request. The only room that knows all the others."""
