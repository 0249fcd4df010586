"""What is installed and what is asked: plugins, models, plans."""
