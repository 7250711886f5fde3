"""DGUNet in other libraries' shapes, one module for each; they are imported by name and need their library."""
