from .schedule import schedule_migration as schedule_migration
from .schedule import staging_limit as staging_limit
