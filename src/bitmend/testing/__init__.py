"""Laws and slow references, public so that plug-ins can use them too."""
