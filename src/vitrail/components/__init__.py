"""The mathematics: attention, positions, patches, residuals, taps. Knows no architecture."""
