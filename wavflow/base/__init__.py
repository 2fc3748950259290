"""What every part stands on: errors, files, processes, seeds, memory; it knows no other folder."""
