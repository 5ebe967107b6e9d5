-- The cluster the migrations expect: roles with least privilege and the two databases.
-- Run with psql as a superuser; running it again changes nothing. Passwords are set elsewhere.
--
--   labelstation_owner   owns data_factory; only migrate.py logs in as it
--   labelstation         what the scripts are: reads and writes data_factory, changes no schema
--   label_studio         owns label_studio; Label Studio itself
--   label_studio_reader  reads the columns of label_studio named in scripts/station/contract.py

SELECT format('CREATE ROLE %I LOGIN', wanted.name)
FROM unnest(ARRAY['labelstation_owner', 'labelstation', 'label_studio', 'label_studio_reader']) AS wanted (name)
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted.name)
\gexec

-- A pull must know how old the oldest open transaction of Label Studio is (pg_stat_activity).
SELECT 'GRANT pg_read_all_stats TO label_studio_reader'
WHERE NOT pg_has_role('label_studio_reader', 'pg_read_all_stats', 'MEMBER')
\gexec

SELECT format('CREATE DATABASE %I OWNER %I ENCODING ''UTF8'' TEMPLATE template0', wanted.name, wanted.owner)
FROM (VALUES ('data_factory', 'labelstation_owner'), ('label_studio', 'label_studio')) AS wanted (name, owner)
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = wanted.name)
\gexec

-- The default lets every role of the cluster connect to every database.
SELECT format('REVOKE CONNECT ON DATABASE %I FROM PUBLIC', datname)
FROM pg_database
WHERE datname IN ('data_factory', 'label_studio') AND has_database_privilege('public', oid, 'CONNECT')
\gexec

SELECT format('GRANT CONNECT ON DATABASE %I TO %I', wanted.name, wanted.role)
FROM (VALUES ('data_factory', 'labelstation'), ('label_studio', 'label_studio_reader')) AS wanted (name, role)
WHERE NOT has_database_privilege(wanted.role, wanted.name, 'CONNECT')
\gexec
