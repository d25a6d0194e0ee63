"""Every figure that the README quotes, from one command each."""
