"""A fleet's processes: started, kept running, and stopped without leaving any behind."""
