"""What pyfuse3 cannot carry: frames as the kernel makes them, no mount. The oracle is a plain directory."""
