"""Python interfaces of other programs, for scripts that use them: only the import changes."""
