"""Other programs' ways to load what secateurs writes; each file is imported only by the program it is for."""
