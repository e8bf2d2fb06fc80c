"""What tests share: small models, a stand-in for the hub, files in published layouts, drivers of panels."""
