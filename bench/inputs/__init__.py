"""What both networks are fed: where it comes from, and how it reaches their inputs."""
