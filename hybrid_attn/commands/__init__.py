"""The programs that an installed package has on the command line; launch/ and tools/ of the repository start them too."""
