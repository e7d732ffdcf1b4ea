"""One of each thing that a package of yours can bring, each in one file."""
