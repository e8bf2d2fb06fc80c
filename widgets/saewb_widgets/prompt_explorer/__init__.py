"""PromptExplorer: its panel, and what only it needs; the front end lies beside."""
