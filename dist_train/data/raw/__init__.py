"""Raw file -> clip: found or fetched, decoded, made 8-bit grey, and cropped at its outline."""
