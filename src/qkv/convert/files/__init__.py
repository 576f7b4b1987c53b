"""What checkpoints are made of: documents, headers, folders, and how a folder comes whole or not at all."""
