"""Pictures and figures that show what a detector does."""
