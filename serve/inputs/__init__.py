"""From what was named (folders, patterns, archives, tables, standard input) to items: one for each image."""
