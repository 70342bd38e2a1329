"""Files that are whole or absent, sealed records, names that lead nowhere else, and who may write."""
