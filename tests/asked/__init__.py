"""Every key of the config and every param of a component, asked for and looked up in what was built."""
