"""Python interfaces of other programs, for scripts that were written for them: the name of the import changes alone."""
