"""The HTTP surface: one file a group of paths. Each route declares its permission; none decides anything."""
