"""What every part uses: processes, progress bars, memory and whole files."""
