"""PromptExplorer: the panel, its helpers and its front end."""
