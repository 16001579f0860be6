"""The protoc plugin that writes clients and service base classes."""
