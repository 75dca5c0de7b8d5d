"""Building, checking and loading the C++ and CUDA libraries."""
