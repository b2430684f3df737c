"""Pictures of a live model: one block as SVG, the whole as an HTML page. Drawn without any tool."""
