"""`init`: a first pipeline file for a folder of pictures, from what is in it and how fast this machine is."""
