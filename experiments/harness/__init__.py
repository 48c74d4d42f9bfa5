"""What every experiment shares: real images, runs that survive a kill, devices, and paired statistics."""
